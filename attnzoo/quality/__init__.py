"""What a pretrained model still does as well when its attention is swapped, without training."""
