"""The measurements behind docs/evidence.md: each is a small file, made once, and a page is made of what is there."""
