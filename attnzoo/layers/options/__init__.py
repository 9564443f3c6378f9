"""What a layer can do to its queries, keys, values and output beside projecting them."""
