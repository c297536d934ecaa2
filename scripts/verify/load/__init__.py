"""Hours of use in minutes: does a server at full load leak, fail, hang or keep health checks waiting?"""
