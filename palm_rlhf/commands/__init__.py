"""The commands of `palm-rlhf`: each a dataclass, whose fields are its flags, and a `run` function."""
