"""Stages that work on finished score caches and logs: a static subset, and files for other tools.

select  catalogue and two score caches -> a static subset, by joint selection without training
export  uids that were kept or selected, and embeddings, in the formats of DataComp and clip-retrieval
"""
