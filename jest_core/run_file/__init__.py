"""The run file: typed parts, every size that follows from them, what is wrong with them, and how it is read.

parts        what a part is, and which of its fields are circumstances
rules        the rules of a catalogue
paths        which paths are absolute, and which are below root
data         the parts that say where examples come from: data, ingest, evaluation
schema       the other parts, and Run, which has them all
consistency  what is wrong with values taken together, each with a remedy
identity     which fields decide whether a run may go on
load         text and overrides -> Run, and back
"""

from jest_core.run_file.data import Data, Evaluation, EvaluationSet, FewShot, Ingest, Pictures
from jest_core.run_file.identity import Identity, identity, in_todays_fields
from jest_core.run_file.load import dump, load, merged, parse
from jest_core.run_file.paths import join, sources
from jest_core.run_file.schema import Features, LowResolution, Model, Reference, Run, Selection, Training

__all__ = [
    "Data",
    "Evaluation",
    "EvaluationSet",
    "Features",
    "FewShot",
    "Identity",
    "Ingest",
    "LowResolution",
    "Model",
    "Pictures",
    "Reference",
    "Run",
    "Selection",
    "Training",
    "dump",
    "identity",
    "in_todays_fields",
    "join",
    "load",
    "merged",
    "parse",
    "sources",
]
