"""Commands of `bwlm analyze`, a module each: the result in words, tables and charts."""
