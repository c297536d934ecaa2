"""Hours of use in minutes: does a server at full load leak, fail or leave a stream hanging?"""
