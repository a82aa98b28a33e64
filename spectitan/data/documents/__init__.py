"""Where documents come from: files found (datasets), read (formats), and what a row of a table says (rows).

A further format is a file beside jsonl.py, with a line in formats.py; a further kind of row is a line and a function in rows.py.
"""

from spectitan.data.documents.datasets import Dataset, find_datasets, validation_datasets
from spectitan.data.documents.reading import HELD_OUT, TRAINING, Document, Found, read_documents
from spectitan.data.documents.rows import Content, Ids, Messages, PromptResponse

__all__ = [
    "HELD_OUT", "TRAINING", "Content", "Dataset", "Document", "Found", "Ids", "Messages", "PromptResponse", "find_datasets",
    "read_documents", "validation_datasets",
]  # fmt: skip
