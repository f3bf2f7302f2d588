"""The page of a run: report.html, one file that shows in pictures and tables what an output_dir holds."""
