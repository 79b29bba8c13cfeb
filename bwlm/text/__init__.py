"""From text to directed batches: source, tokenizer, packed rows, direction, stream."""
