"""Text in: documents from the standard library, from files and from folders."""

from cpmtp.corpora.documents import Document as Document
from cpmtp.corpora.documents import corpus_hash as corpus_hash
from cpmtp.corpora.documents import split_held_out as split_held_out
from cpmtp.corpora.documents import split_packages as split_packages
from cpmtp.corpora.files import Corpus as Corpus
from cpmtp.corpora.files import read_corpus as read_corpus
from cpmtp.corpora.files import read_document as read_document
from cpmtp.corpora.files import read_documents as read_documents
from cpmtp.corpora.library import DOMAINS as DOMAINS
from cpmtp.corpora.library import installed_code_documents as installed_code_documents
from cpmtp.corpora.library import standard_library_documents as standard_library_documents
