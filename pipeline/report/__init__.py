"""Reports: self-contained HTML pages of a cohort and of a training."""
