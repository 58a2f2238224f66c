"""Finished runs and caches -> tables and pages.

comparison   finished runs -> the table that compares them
composition  the share of each source, language or kind of noise in what was drawn
pictures     thumbnails and charts of pages
study        a run's checkpoints -> what selection does on one super-batch
report       `jest report`: finished runs -> one page
thresholds   `jest thresholds`: a column of a cache -> a page to choose a threshold by
"""
