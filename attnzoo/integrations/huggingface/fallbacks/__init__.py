"""This library's engine under the recurrent layers of transformers' hybrid models."""
