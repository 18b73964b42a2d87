"""Books in, clean paragraphs out: the catalogue, downloading, reading, cleaning, splitting, and the files they become.

Knows nothing of tokens or models. Importing it is cheap: libraries are imported where they are used.
"""

from __future__ import annotations

from miniglm.corpus.catalog import CATALOG, DEFAULT_BOOK, CatalogEntry
from miniglm.corpus.cleaning import Book, Paragraph, Removal, clean
from miniglm.corpus.download import Progress, cache_folder
from miniglm.corpus.sources import load_books
from miniglm.corpus.splitting import Split, split
from miniglm.corpus.storage import read_paragraphs, write_corpus

__all__ = [
    "CATALOG",
    "DEFAULT_BOOK",
    "Book",
    "CatalogEntry",
    "Paragraph",
    "Progress",
    "Removal",
    "Split",
    "cache_folder",
    "clean",
    "load_books",
    "read_paragraphs",
    "split",
    "write_corpus",
]
