"""Rows D1, D2, D3, D7 and D10: what a request may be."""

from tests.faults import requests_access, requests_fuzz, requests_numbers, requests_openapi, requests_text

ROWS = (*requests_fuzz.ROWS, *requests_openapi.ROWS, *requests_numbers.ROWS, *requests_text.ROWS, *requests_access.ROWS)
