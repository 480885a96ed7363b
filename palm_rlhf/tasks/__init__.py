"""Tasks: texts to imitate, prompts to answer, a reward, and problems held back to judge by."""
