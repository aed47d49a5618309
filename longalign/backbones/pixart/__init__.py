"""The backbone `pixart`: PixArt-alpha and PixArt-Sigma."""
