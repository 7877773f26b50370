"""The paper, one idea a file. Torch only: no Ray, no DeepSpeed, no files."""
