"""Static subsets, and what other tools read.

select  catalogue and two caches -> a static subset
export  what was kept, selected or embedded, in the formats of other tools
"""
