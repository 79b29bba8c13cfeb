"""Modules of the `bwlm analyze` commands, one each: a result in words, tables and charts."""
