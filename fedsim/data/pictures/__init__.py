"""Pictures that stay in their files: found by an index, decoded where and when they are needed."""
