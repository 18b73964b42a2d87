"""`python -m miniglm` is the command `miniglm`."""

from miniglm.cli import main

main()
