"""llama.cpp's files, read and written."""
