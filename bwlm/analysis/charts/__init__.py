"""Every chart of reports and analyses, in one look, by altair: the only package that draws."""
