"""The recipe of the embedded model: data, training, evaluation. Not part of the installed package."""
