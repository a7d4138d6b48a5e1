"""Pictures that stay in their files: memory against their number, decoding, and what a step waits for."""
