"""The page of `lora report`: one HTML file that needs nothing else."""
