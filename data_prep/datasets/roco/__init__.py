"""What ROCO and ROCOv2 share: the layout of their releases, and made-up releases for tests."""
