"""Training by several processes, on one machine or on many, started by torchrun: who is who (launch.py), what they tell
each other (team.py), how they train one model together (engine.py, and sharding.py where none of them holds it whole), which
of these it is (choice.py), and the state of a sharded one (sharded_state.py).

Importing the package costs nothing; a run of one process uses `engine.OneProcess`, which does nothing beside the work.
"""
