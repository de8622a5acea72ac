"""Train small guide models that make black-box LLMs succeed."""
