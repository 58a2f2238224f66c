"""Catalogue + reference model -> score cache: the embeddings of every kept pair, beside the shards.

score_cache       read a score cache: its manifest, and its rows beside those of a shard
stored_tokens     the tokens of captions, stored beside their scores
parts             write a score cache: embedded blocks -> fragments -> a part for each shard -> manifest
calibration       fit a logit_bias for a reference model that was trained without one
imported          embeddings that DataComp or clip-retrieval computed -> score cache
embedder          a reference model on its device: blocks of decoded rows -> embeddings and scores
reference_scores  the stage: embed every kept pair once; `--verify` embeds a sample again
"""
