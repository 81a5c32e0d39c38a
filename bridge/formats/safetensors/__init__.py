"""safetensors files: state_dicts and PEFT adapters."""
