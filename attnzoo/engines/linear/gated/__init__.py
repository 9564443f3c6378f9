"""Gates and delta rules: linear attention whose state fades and is written anew, by the data."""
