"""A page to try trimming on: ask about an image under two settings, and see what each keeps and costs.

A client of the server and nothing more. `page.py` alone knows Gradio, which is optional; the other files are what it
sends and shows.
"""
