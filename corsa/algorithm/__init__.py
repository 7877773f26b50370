"""The paper's method, one idea per file. Needs only torch: no Ray, no DeepSpeed, no file access."""
