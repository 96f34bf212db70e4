"""Saliency maps measured against boxes: `python -m tools.eval_saliency`, docs/saliency.md."""
