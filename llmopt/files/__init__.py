"""safetensors, JSON and hub folders: checked, read, written."""
