"""A report as one HTML file that needs nothing outside itself: numbers, charts and masks."""

from purprune_adapters.html_report.page import write_html as write_html
