"""Search methods: particles, trees, and their correctors."""
