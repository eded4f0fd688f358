"""The world of coloured shapes: captions, pictures, and the oracle that reads them."""
