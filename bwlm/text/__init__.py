"""Text, from source to directed batches: source, tokenizer, packed rows, direction, stream."""
