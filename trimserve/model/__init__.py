"""Mllama over transformers' weights; prompts and images into what it reads."""
