-- Keep the lease, or give it up, if it is still ours.
-- KEYS[1] lease
-- ARGV[1] fencing token   ARGV[2] lifetime in milliseconds, 0 to release
-- Returns 1 when it was ours, 0 when not.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
  return 0
end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
else
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 1
