"""snpatch inside other people's tools."""
