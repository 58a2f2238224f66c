"""Catalogue + reference model -> score cache: the embeddings of every kept pair, beside the shards.

score_cache       its parts, row for row beside the shards; its manifest
calibration       a logit_bias for a reference that was trained without one
imported          embeddings of DataComp or clip-retrieval -> score cache
reference_scores  the stage: every kept pair embedded once
"""
