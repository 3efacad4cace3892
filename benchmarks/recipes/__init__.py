"""Trainings that might reach the loss of LoRA in all layers sooner: `python -m benchmarks.recipes`.

recipe   a training as one line of key=value       rows, choice   what it trains and is measured on
grids    lists of recipes                          adapter        what is trained, and where
course   the steps, and the curve over seconds     results        the file of cases; `table` of them
"""
