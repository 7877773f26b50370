"""LoRA as one flat tensor, PEFT files, arithmetic of adapters."""
