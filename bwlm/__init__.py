"""bwlm: which way should a language model read?"""

__version__ = "0.1.0"
