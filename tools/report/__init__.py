"""Reports on evaluations: python -m tools.report WORKDIR… writes report.md and report.html.

evaluations    what a workdir's eval/ holds, and whether metrics.json follows from it
sections       what a report says about each evaluation and each pair
paper          the paper's tables, published figures next to ours
contamination  prompts in answers, answers that ignore the image; also in others' files
foreign        others' predictions beside ours
foreign_files  how lmms-eval, VLMEvalKit and others write theirs
figures        which figures are shown, and which answers count as right
plots          accuracies and reliability as SVG
pictures       images from the built data set
blocks         what a report is made of, and its two forms
"""
