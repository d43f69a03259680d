"""How a checkpoint is quantized: text → samples → calibration → export → cache. quantization.py is the door."""
