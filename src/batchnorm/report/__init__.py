"""Reports: documents as data, and the renderers that draw them for terminals, browsers and programs."""

from batchnorm.report.document import COLOURS as COLOURS
from batchnorm.report.document import Block as Block
from batchnorm.report.document import Document as Document
from batchnorm.report.document import Figure as Figure
from batchnorm.report.document import Formula as Formula
from batchnorm.report.document import Paragraph as Paragraph
from batchnorm.report.document import Question as Question
from batchnorm.report.document import Section as Section
from batchnorm.report.document import Slider as Slider
from batchnorm.report.document import Table as Table
from batchnorm.report.document import Tone as Tone
from batchnorm.report.document import Verdict as Verdict
from batchnorm.report.document import finite as finite
from batchnorm.report.reported import Reported as Reported

__all__ = [
    "COLOURS",
    "Block",
    "Document",
    "Figure",
    "Formula",
    "Paragraph",
    "Question",
    "Reported",
    "Section",
    "Slider",
    "Table",
    "Tone",
    "Verdict",
    "finite",
]
