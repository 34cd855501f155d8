"""`python -m jqserve.demo`: a small quantized model that ships with the package, served and asked a few things."""
